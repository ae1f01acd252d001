"""The only rooms that import ray or deepspeed: implementations of the engine, pool and worker group protocols."""
