"""Networks: the denoisers and the classifier; they know nothing of data, ranks or recipes."""
