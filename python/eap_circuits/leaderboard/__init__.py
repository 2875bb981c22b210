"""Methods side by side on the package's tasks: what circuits they find, and at what cost."""

from .measure import LEARNED, RANKINGS, Settings, leaderboard, of_pairs, of_task
from .page import write_page

__all__ = ["LEARNED", "RANKINGS", "Settings", "leaderboard", "of_pairs", "of_task", "write_page"]
