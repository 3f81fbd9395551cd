"""The main job on sample data (`make demo`), and the two servers on fixed ports (`make up`)."""
