"""Files: storage, the checkpoint store, checksummed records, and the fence of attempts."""
