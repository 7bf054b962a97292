"""Functions on modules: spectral normalisation of weights and of convolutions, bounds of Lipschitz constants."""

from pygen.nn.utils.conv_spectral_norm import conv_operator_norm, conv_spectral_norm
from pygen.nn.utils.lipschitz import lipschitz_bound
from pygen.nn.utils.spectral_norm import spectral_norm, spectral_norm_all

__all__ = ["conv_operator_norm", "conv_spectral_norm", "lipschitz_bound", "spectral_norm", "spectral_norm_all"]
