"""Commands other than the run: inspect, audit, doctor."""
