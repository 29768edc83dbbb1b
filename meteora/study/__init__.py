"""The paper's experiments, as the notebooks run them; the library itself does not import this package."""
