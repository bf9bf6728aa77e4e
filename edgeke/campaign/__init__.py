"""The CIFAR-100 campaign: trained on a bare machine by scripts/cifar100, brought home to DVC."""
