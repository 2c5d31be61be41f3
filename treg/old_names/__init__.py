"""Modules under the names of the last release, which the next one drops. They are found as
`treg.NAME`.
"""
