# Usual commands; `just` alone lists them.

_default:
    @just --list

# The package with everything that tests, linters and documentation need.
install:
    pip install -e '.[test,lint,docs]'

# Everything but whole trainings: 4 minutes at most on two cores.
quick *options:
    pytest -m "not slow" {{options}}

# All tests: 20 minutes at most on two cores.
test *options:
    pytest {{options}}

lint:
    ruff check .
    ruff format --check .
    mypy

# The site, to build/site; a broken link or an undocumented reference is an error.
docs:
    mkdocs build --strict
