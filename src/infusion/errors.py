"""The one error type that users see: a sentence that names the value, the rule and the remedy."""


class InfusionError(ValueError):
    """Bad input or an unsupported situation; the message is fit to be shown as it is."""
