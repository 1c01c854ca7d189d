"""Where the files beside the package are: conf/, recipes/, slurm/, tools/, train.py. No torch.

In a checkout they lie beside mixtrain/; a wheel carries them in mixtrain/share/ (setup.py).
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHARE = PACKAGE / "share"
ROOT = SHARE if SHARE.is_dir() else PACKAGE.parent
CONF = ROOT / "conf"
