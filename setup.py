"""What pyproject.toml cannot say: packages found in two source roots, beside two folders shipped under other names."""

from setuptools import find_packages, setup

SHIPPED_AS = {"rung.configs": "configs", "rung.launch_templates": "launch"}

setup(
    packages=[*find_packages("trainer"), *find_packages("kernels"), *SHIPPED_AS],
    package_dir={"rung": "trainer/rung", "rung_kernels": "kernels/rung_kernels", **SHIPPED_AS},
)
