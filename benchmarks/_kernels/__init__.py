"""The benchmark of the kernels: models, peers, what is measured, bars, report and figure."""
