"""Functions on modules: spectral normalisation, Lipschitz bounds."""
