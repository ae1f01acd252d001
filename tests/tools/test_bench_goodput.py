from hypothesis import given
from hypothesis import strategies as st

from tools.bench_goodput import preempted_steps


@given(st.integers(1, 9), st.integers(20, 3000), st.integers(0, 99))
def test_preemptions_are_spread_over_the_run_and_the_same_for_a_seed(preemptions, steps, seed):
    drawn = preempted_steps(steps * preemptions, preemptions, seed=seed)
    assert drawn == preempted_steps(steps * preemptions, preemptions, seed=seed)
    assert [step // steps for step in drawn] == list(range(preemptions))
