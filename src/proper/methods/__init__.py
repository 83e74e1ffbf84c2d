"""Methods under comparison (stages, baselines, ablations, controls): training data, training and inference of each."""
