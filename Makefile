# make demo and make test need nothing but a Python from 3.11 on: both make the virtual environment and install into it.
PYTHON ?= python3
BIN := .venv/bin
NATIVE = $(wildcard native/include/* native/src/* native/tests/*)

.PHONY: demo test test-native test-vllm lint format docs clean

demo: .venv/installed
	$(BIN)/griffin demo

test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist loadfile

# The native library's own tests, under the address and undefined-behaviour sanitisers.
test-native:
	cmake -S native -B build/sanitize -DGRIFFIN_SANITIZE=ON
	cmake --build build/sanitize --parallel 2
	ctest --test-dir build/sanitize --output-on-failure

# The vLLM plugin's tests, in an environment of their own: vLLM brings another transformers. Skipped where it cannot be had.
test-vllm:
	PYTHON=$(PYTHON) bash tests/vllm_plugin/run.sh

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: .venv/installed
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE)

# The documentation as a site, in site/.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/installed: pyproject.toml constraints.txt $(wildcard native/CMakeLists.txt native/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-vllm build site
