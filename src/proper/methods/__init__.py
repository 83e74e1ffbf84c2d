"""Methods under comparison (baselines, ladder, ablations, controls): training data, training and inference of each."""
