# make test        all checks that take minutes: what to run after a change
# make test-slow   the long ones: the full flan-t5-small shape, runs killed at random moments
# make format      let ruff format and mend the code

PYTHON ?= python3
export HF_HUB_OFFLINE = 1

.PHONY: test test-slow format

test: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest --durations=5

test-slow: .venv/dev
	.venv/bin/python -m pytest -m slow --durations=5

format: .venv/dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.venv/dev: requirements.txt requirements-dev.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@
