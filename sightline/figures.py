"""A figure that a notebook shows as the last value of a cell, whoever has imported pyplot or not.

Imports matplotlib, so it is imported where a picture is drawn. Knows nothing of what is drawn.
"""

import io

from matplotlib import figure


class Figure(figure.Figure):
    """matplotlib's own figure, which alone has no picture of itself: pyplot would tell IPython how to make one."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
