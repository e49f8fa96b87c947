"""Tasks, methods and results: every method on the same labelled examples, the same queries and the same features."""
