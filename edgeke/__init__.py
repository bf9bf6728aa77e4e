"""EdgeKE: on-demand vision models for edge devices through distillation and early exits."""
