"""viewmesh: photos of an object in, a textured PBR mesh out.

The library that the deployments run. It imports no Ray and no HTTP framework.
"""

__version__ = "0.1.0"
