"""What tests of this package, and of other implementations of its seams, are built from.

Contract suites, a simulated clock, backends with faults. The product never imports it.
"""
