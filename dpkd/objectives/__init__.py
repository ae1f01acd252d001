"""What a network is trained on: pure functions of tensors, each with its source."""
