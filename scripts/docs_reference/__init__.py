"""Generated pages of the documentation: references of the command line, config, Python API and HTTP API, module list.

`make reference` writes the pages into `docs/`: `python -m docs_reference` with `scripts` on the import path. `--check`
writes nothing and fails if a page is stale.
"""
