"""Flows that were trained with nflows, FrEIA or a Glow in PyTorch, as flows of pygen.nn. How to: docs/converting.md.

No peer is imported: its objects are recognised by the names of their classes, its files by their keys.
"""

from pygen.nn._from_freia import from_freia
from pygen.nn._from_glow import from_glow_state_dict
from pygen.nn._from_nflows import from_nflows

__all__ = ["from_freia", "from_glow_state_dict", "from_nflows"]
