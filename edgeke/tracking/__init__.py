"""MLflow: what stages report, the model that is served, what is kept while the store is away."""
