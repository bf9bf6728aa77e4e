.DEFAULT_GOAL := help
VENV := .venv/bin
export PATH := $(CURDIR)/$(VENV):$(PATH)

.PHONY: help setup run test check show plots picture ui bundle

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: ## create .venv and install the pinned requirements
	@scripts/setup

run: setup ## build everything: the whole pipeline on the profile in params.yaml
	dvc repro

test: setup ## checks and the whole test suite
	scripts/check
	scripts/test

check: setup ## format, lint, types, dvc.lock
	scripts/check

show: setup ## experiments in the terminal: what was changed and the headline metrics
	dvc exp show --no-pager --drop '.*' \
	  --keep '(Experiment|Created|profile$$|kd\.|branchynet\.|test/(full|exit_0|teacher)/accuracy$$)'

plots: setup ## dvc_plots/index.html: curves, accuracy against cost, exit shares, reliability
	dvc plots show

picture: setup ## docs/pictures: the README's pictures, from the last run's plots
	scripts/picture

ui: setup ## open MLflow on the project's store (http://127.0.0.1:5000)
	mlflow ui --backend-store-uri sqlite:///$(CURDIR)/mlflow/mlflow.db

bundle: setup ## bundle/ and bundle.zip: the built model with all it needs on a device
	@scripts/bundle
