"""`safemoe plan`: from a config to what is printed and written."""

from pathlib import Path

from safemoe_jax.config import Config
from safemoe_jax.errors import UserError
from safemoe_jax.planning import plan as planning
from safemoe_jax.planning import report
from safemoe_jax.planning import search as searching
from safemoe_jax.planning.topologies import get_topology
from safemoe_jax.weights.base import read_spec
from safemoe_jax.workdir import write_json


def plan(config: Config, topology: str, json: Path | None, picture: Path | None) -> None:
    """Plans a config as it is.

    Raises:
      UserError: where it does not fit, or a name is unknown.
    """
    _check(json, picture)
    found = planning.plan(config, read_spec(config.model.source), get_topology(topology))
    report.show(found)
    if json:
        write_json(json, report.as_json(found))
    if picture:
        report.write_picture(found, picture)
    found.check()


def search(config: Config, topology: str, json: Path | None, picture: Path | None) -> None:
    """Plans variants of a config and ranks them; the picture is the best one's.

    Raises:
      UserError: where none fits, or a name is unknown.
    """
    _check(json, picture)
    tried = searching.search(config, read_spec(config.model.source), get_topology(topology))
    report.show_search(tried)
    if json:
        write_json(json, [report.candidate_as_json(one) for one in tried])
    if picture:
        assert tried[0].plan  # what fits has one, and the best fits
        report.write_picture(tried[0].plan, picture)


def _check(json: Path | None, picture: Path | None) -> None:
    """Before minutes of compiling: can what is found be written?"""
    if picture and picture.suffix != ".html":
        raise UserError(f"--picture {picture} is no .html; a picture is a page, so give one")
    for path in (json, picture):
        if path and not path.parent.is_dir():
            raise UserError(f"{path.parent} is no directory; make it, or give another path")
        if path and path.is_dir():
            raise UserError(f"{path} is a directory; give the path of a file")
