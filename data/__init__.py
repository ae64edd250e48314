"""States and where they come from."""

from data.reading import FILES  # noqa: F401
from data.state import State  # noqa: F401
