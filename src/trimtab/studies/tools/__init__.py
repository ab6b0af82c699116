"""What tasks and experiments are built from: the training loop, the stopwatch, peak memory, pretrained parts."""
