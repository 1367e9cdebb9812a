"""The error and the warning that users see: a sentence that names the value, the rule and the remedy."""


class InfusionWarning(UserWarning):
    """Something that works, but perhaps not as meant."""


class InfusionError(ValueError):
    """Bad input or an unsupported situation; the message is fit to be shown as it is."""
