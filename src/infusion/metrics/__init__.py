"""Measures of overfitting: tensors in, numbers out. No models, no files."""
