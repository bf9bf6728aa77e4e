"""The device's own error: a device has no other room to import it from."""

__all__ = ["DeviceError"]


class DeviceError(ValueError):
    """A model, policy, image or request cannot be used; the message says what to do."""
