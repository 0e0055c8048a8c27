# Everything runs in .venv, which the first target that needs it makes. ARGS goes to the program:
# make test ARGS="-k guard"

BIN := .venv/bin

.PHONY: help setup test coverage torture demo bench image-test systemd-test lint format lock pins clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.ready ## .venv with the locked packages, by uv or by plain Python

.venv/.ready: uv.lock pyproject.toml requirements-dev.txt tools/setup
	@tools/setup

test: .venv/.ready ## all tests, on private servers
	@$(BIN)/pytest -n auto --dist worksteal $(ARGS)

coverage: .venv/.ready ## all tests in a random order, with the coverage floor: twice the time
	@$(BIN)/pytest -n auto --dist worksteal --random-order-bucket=global --cov=balancesync $(ARGS)

torture: .venv/.ready ## the fault suite in its long form: some half an hour
	@BALANCESYNC_TORTURE=1 $(BIN)/pytest -n auto --dist worksteal -o faulthandler_timeout=1800 tests/faults $(ARGS)

demo: .venv/.ready ## real balances from a real Redis into a real PostgreSQL
	@$(BIN)/python -m balancesync demo $(ARGS)

bench: .venv/.ready ## the benchmark; N=1000000 is the number of keys
	@$(BIN)/python -m benchmarks $(if $(N),--keys $(N)) $(ARGS)

image-test: .venv/.ready ## builds the image with buildah and runs what is in it (root, two minutes)
	@tools/image-test

systemd-test: .venv/.ready ## the daemon under a real systemd in a container (root, two minutes)
	@tools/systemd-test

lint: .venv/.ready ## ruff, mypy and the layers
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: .venv/.ready ## ruff, with what it can fix
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

lock: ## newer versions of what we depend on, for uv and for pip
	uv lock --upgrade
	$(MAKE) --silent pins >requirements-dev.txt

pins: ## what uv.lock holds, as pip wants it
	@echo "# From uv.lock, for pip, by \`make lock\`."
	@uv export --quiet --frozen --all-extras --all-groups \
		--no-emit-project --no-annotate --no-header

clean: ## removes .venv and all that the tools leave
	rm -rf .venv build dist htmlcov .coverage .coverage.* .hypothesis .import_linter_cache
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find balancesync tests benchmarks -name __pycache__ -exec rm -rf {} +
