"""One file per method; the file name is the method's name in recipes. Each defines METHOD (see `surgery/method.py`)."""
