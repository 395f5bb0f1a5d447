"""`Edition`: captures as they are served, until newer ones take their place. Knows nothing of HTTP."""

from collections import OrderedDict
from collections.abc import Mapping

from sightline.captures import Capture
from sightline.passages import Passages
from sightline.pyramid import Pyramid
from sightline.viewer.manifest import manifest

CACHE_BYTES = 64 * 2**20


class Edition:
    """The pyramids of some captures, what a page must know of them, and the pictures that were asked for last.

    `goal`: how many tokens there will be when the model has written them. None: it is not writing.
    """

    def __init__(self, captures: Mapping[str, Capture], goal: int | None = None) -> None:
        self.names = list(captures)
        self.pyramids = [Pyramid(capture) for capture in captures.values()]
        self.passages = [Passages(capture.key_tokens, capture.separator) for capture in captures.values()]
        said = manifest(dict(zip(self.names, self.pyramids, strict=True)), self.passages)
        # The last edition may hold what the one before it held.
        self.version = f"{said['version']}{'' if goal is None else 'w'}"
        self.manifest = said | {"version": self.version, "goal": goal}
        self._pictures: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    def pyramid(self, number: int) -> Pyramid:
        """Raises ValueError for a capture that is not there."""
        return self.pyramids[self._checked(number)]

    def text(self, number: int) -> Passages:
        """Raises ValueError for a capture that is not there."""
        return self.passages[self._checked(number)]

    def cached(self, name: str) -> bytes | None:
        """The picture of this name, if it is among those asked for last."""
        picture = self._pictures.get(name)
        if picture is not None:
            self._pictures.move_to_end(name)
        return picture

    def keep(self, name: str, picture: bytes) -> None:
        """Keep a picture, and let go of those that have not been asked for the longest."""
        if name not in self._pictures:
            self._pictures[name] = picture
            self._bytes += len(picture)
        while self._bytes > CACHE_BYTES:
            self._bytes -= len(self._pictures.popitem(last=False)[1])

    def _checked(self, number: int) -> int:
        if number >= len(self.pyramids):
            raise ValueError(f"captures are 0 to {len(self.pyramids) - 1}, got {number}")
        return number
