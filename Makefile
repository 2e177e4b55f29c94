# Two commands: `make demo` shows the whole product, `make test` proves it. Both make their own environment first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test clean

demo: $(VENV)/.installed
	$(BIN)/expertmesh train quickstart
	$(BIN)/expertmesh generate runs/quickstart --prompt "The import statement" --max-tokens 60
	@echo "The same, with attention and experts in separate workers:"
	$(BIN)/expertmesh generate runs/quickstart --prompt "The import statement" --max-tokens 60 --attention 1 --ffn 2
	@echo "Now open runs/quickstart/report.html in a browser, or serve the model:"
	@echo "  $(BIN)/expertmesh serve runs/quickstart --attention 1 --ffn 1"

test: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder  # each file in one process, one after the other

# Installed anew only when what we depend on changes; the code itself is linked.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): two to four minutes, once"
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable .[test]
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
