"""What plugs treg into other libraries, a file each: the only place that subclasses or patches a
third party.
"""
