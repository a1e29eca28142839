"""``python -m wemoe_fast``."""

from .cli import main

raise SystemExit(main())
