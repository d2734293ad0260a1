"""This package inside others. Each module needs an extra; importing the package needs none."""
