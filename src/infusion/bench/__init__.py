"""The benchmark on the world: every method on the same subjects, prompts and seeds, one JSON a job."""
