"""An own plugin's test: does it keep the contract?"""

from snncompress_peak import Peak

from snncompress.testing import check_criterion


def test_peak_keeps_the_contract():
    check_criterion(Peak())
