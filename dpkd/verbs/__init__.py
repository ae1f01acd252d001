"""Commands beside the run: inspect, audit, doctor."""
