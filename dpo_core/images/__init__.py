"""Images: a world with an exact detector, image codes, denoisers, and the layouts of public benchmarks."""
