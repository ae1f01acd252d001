"""What a person sees of a run: progress lines, TensorBoard, the summary."""
