"""What training on many GPUs takes: memory, bytes exchanged and time, before anything runs."""
