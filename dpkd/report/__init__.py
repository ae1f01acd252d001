"""Reports of a run: TensorBoard, pictures, the summary, goodput, quarantine, model cards."""
