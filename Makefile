# Every target makes .venv first, once: again only after pyproject.toml changed.
.PHONY: help demo test test-all check clean

PYTHON = .venv/bin/python
# Each worker takes some GB of memory and compiles on several cores.
PYTEST = $(PYTHON) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

help:
	@echo 'make demo      fine-tune the embedded model on the embedded data, from start to end'
	@echo 'make test      run the tests'
	@echo 'make test-all  run the long tests too, half an hour on two cores'
	@echo 'make check     lint, check the format and the types'
	@echo 'make clean     remove .venv and the caches of the tools'

demo: .venv/.installed
	@$(PYTHON) -m jaxft.demo

test: .venv/.installed
	@$(PYTEST)

test-all: .venv/.installed
	@$(PYTEST) -m '' --dist loadgroup

check: .venv/.installed
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PYTHON) -m pyright

clean:
	@rm -rf .venv .hypothesis .pytest_cache .ruff_cache

.venv/.installed: pyproject.toml tools/make_venv.sh
	@sh tools/make_venv.sh
