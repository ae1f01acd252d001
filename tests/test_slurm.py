"""The Slurm script beside stubs of Slurm, Ray and the run: what it starts, passes on, queues again and returns."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "cluster" / "slurm.sh"
JOB = "31007"
LOG = '#!/bin/bash\necho "$(basename "$0") $*" >> "$CALLS"\n'
STUBS = {
    "hostname": '#!/bin/bash\n[ "$1" = --ip-address ] && echo 10.0.0.1 fe80::1 || echo one\n',
    "scontrol": LOG + 'eval "$AT_REQUEUE"\n',
    "sleep": "#!/bin/bash\nexec /bin/sleep 0.1\n",
    "ray": LOG + '[ -n "$RAY_AUTH_MODE" ] || echo "no tokens" >> "$CALLS"\n',
    "srun": LOG + 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',
    # asked what lives in the cluster, it tells; else it is the run, which saves for a while when a signal asks it to
    "python": '#!/bin/bash\n[ "$1" = -c ] && { echo 2; exit; }\n'
    + LOG.partition("\n")[2]
    + """
asked() { echo "asked $1" >> "$CALLS"; /bin/sleep 0.5; echo saved >> "$CALLS"; exit 75; }
trap 'asked USR1' USR1
trap 'asked TERM' TERM
/bin/sleep 0.1  # until the script has set its own traps
echo "at $RAY_ADDRESS" >> "$CALLS"
eval "$RUN"
while :; do /bin/sleep 0.05; done
""",
}


class Job:
    """The script as Slurm starts it on the first of two machines; `run` is what the run does, else it waits."""

    def __init__(self, folder: Path, *, run: str = "", at_requeue: str = "") -> None:
        self._calls = folder / "calls"
        for name, text in STUBS.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        own = {"HOME": str(folder), "CALLS": str(self._calls), "RUN": run, "AT_REQUEUE": at_requeue}
        slurm = {"SLURM_JOB_ID": JOB, "SLURM_NNODES": "2", "PATH": f"{folder}:{os.environ['PATH']}"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            ["bash", SCRIPT, "a.yaml", "run.dir=/runs/a b"],
            env=inherited | own | slurm,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def calls(self) -> list[str]:
        """What the stubs were called with, and what the run wrote down, in that order."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def asked(self, number: signal.Signals) -> "Job":
        """The job once it was sent a signal, which Slurm's `B:` and `scancel --batch` send to the script alone."""
        while not any(call.startswith("at ") for call in self.calls()):
            assert self.process.poll() is None, self.calls()
            time.sleep(0.02)
        self.process.send_signal(number)
        return self

    def status(self) -> int:
        """The exit status of the script."""
        try:
            return self.process.wait(timeout=60)
        finally:
            with suppress(ProcessLookupError):  # none is left, as it should be
                os.killpg(self.process.pid, signal.SIGKILL)

    def requeues(self) -> list[str]:
        """The calls of scontrol."""
        return [call for call in self.calls() if call.startswith("scontrol")]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_job_whose_time_is_up_saves_and_queues_again(tmp_path, number):
    job = Job(tmp_path).asked(number)
    assert job.status() == 75
    assert job.calls()[-3:] == ["asked USR1", "saved", f"scontrol requeue {JOB}"]
    assert len(job.requeues()) == 1


def test_a_cancelled_job_saves_and_does_not_queue_again(tmp_path):
    job = Job(tmp_path).asked(signal.SIGTERM)
    assert job.status() == 75
    assert job.calls()[-2:] == ["asked TERM", "saved"]


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_a_run_that_ends_by_itself_gives_its_status_and_does_not_queue_again(tmp_path, status):
    job = Job(tmp_path, run=f"exit {status}")
    assert job.status() == status
    assert job.requeues() == []


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_a_run_that_ends_as_its_time_is_up_gives_its_status(tmp_path, status):
    job = Job(tmp_path, run=f"trap '' USR1; kill -USR1 $PPID; exit {status}")
    assert job.status() == status
    assert job.requeues() == ([f"scontrol requeue {JOB}"] if status == 75 else [])


def test_a_job_that_is_ended_because_it_queues_again_keeps_its_status(tmp_path):
    job = Job(tmp_path, at_requeue="kill -TERM $PPID; /bin/sleep 0.2").asked(signal.SIGUSR1)
    assert job.status() == 75
    assert len(job.requeues()) == 1


def test_ray_starts_with_tokens_on_every_machine_and_the_run_goes_to_its_head(tmp_path):
    job = Job(tmp_path, run="exit 0")
    assert job.status() == 0
    head, calls = "10.0.0.1:21007", job.calls()
    assert calls[0] == "ray get-auth-token --generate"
    started = f"--node-ip-address=10.0.0.1 --port={head.partition(':')[2]} --dashboard-host=127.0.0.1"
    assert f"srun --nodes=1 --ntasks=1 --nodelist=one --overlap ray start --head --block {started}" in calls
    others = [call for call in calls if call.startswith("srun --nodes=1 --ntasks=1 --exclude=one --overlap")]
    assert len(others) == 1
    assert f"ray start --block --address={head}" in others[0]
    assert "python -m dpkd.pretrain --config a.yaml launcher.kind=ray run.dir=/runs/a b" in calls
    assert f"at {head}" in calls
    assert "no tokens" not in calls
